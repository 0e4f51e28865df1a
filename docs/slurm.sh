#!/bin/bash
# Train a config on two machines of eight GPUs; at the time limit, checkpoint and queue again: sbatch slurm.sh CONFIG
#SBATCH --job-name=zoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

config=$1
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$host:29500" --max-restarts 3 \
    -m zoo train "$config" --work-dir "work_dirs/slurm/$SLURM_JOB_ID" --resume &
training=$!

stop() {
    requeue=1
    scancel --signal=TERM "$SLURM_JOB_ID" # to torchrun, but not to this script: all processes checkpoint and stop
}
trap stop USR1

wait "$training"
status=$?
if [ "$requeue" ]; then
    wait "$training" # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

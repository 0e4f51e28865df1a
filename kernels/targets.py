"""Compiling launches for GPUs that aren't here, with the ptxas that Triton's wheel brings, and what came of it.

It needs Triton with its NVIDIA backend, not a GPU nor a driver, and a process that doesn't interpret kernels.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch

# Shared memory of one program, in KiB, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
POINTERS = {
    torch.float16: '*fp16',
    torch.bfloat16: '*bf16',
    torch.float32: '*fp32',
    torch.int32: '*i32',
    torch.int64: '*i64',
}
INSTRUCTION = re.compile(r'/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);')  # of cuobjdump -sass
TENSOR_CORE = re.compile(r'(wgmma\.mma_async|tcgen05\.mma|mma\.sync)')


class Compiled(NamedTuple):
    """What a kernel takes of a GPU, per thread or (shared) per program, and the tensor-core instructions it uses."""

    registers: int
    stack: int  # bytes; more than none are spilled registers
    shared: int  # bytes
    loop: int  # instructions of the longest loop that has no other in it
    reloads: int  # of them those that load spilled registers
    instructions: tuple[str, ...]


def longest_loop(listing: str) -> list[str]:
    """Names of the instructions of the longest loop that has no other in it, by what `cuobjdump -sass` prints."""
    found = [(int(address, 16), name, operands) for address, name, operands in INSTRUCTION.findall(listing)]
    jumps = [(re.search(r'0x([0-9a-f]+)', operands), address) for address, name, operands in found if name == 'BRA']
    loops = [(int(start[1], 16), end) for start, end in jumps if start and int(start[1], 16) < end]
    inner = [(start, end) for start, end in loops if not any(start <= a and b < end for a, b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    return [name for address, name, _ in found if start <= address <= end]


def _specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as Triton makes them of the arguments of a call."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = 'constexpr', value
        elif isinstance(value, Tensor):
            signature[name], attributes[index,] = POINTERS[value.dtype], [['tt.divisibility', 16]]
        elif isinstance(value, float):
            signature[name] = 'fp32'
        elif parameter.do_not_specialize:
            signature[name] = 'i32'
        elif value == 1:
            signature[name], constants[name] = 'constexpr', 1
        else:
            signature[name] = 'i32'
            if value % 16 == 0:
                attributes[index,] = [['tt.divisibility', 16]]
    return signature, constants, attributes


def compile_for(launch: Launch, target: int) -> Compiled:
    """Compile `launch`, whose tensors may be on meta, for a compute capability as in sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget('cuda', target, 32), options=launch.options)
    cuobjdump = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'kernel.cubin')
        file.write_bytes(compiled.asm['cubin'])
        usage, listing = (
            subprocess.run([cuobjdump, option, file], capture_output=True, text=True, check=True)
            for option in ('-res-usage', '-sass')
        )
    registers, stack = re.search(r'REG:(\d+).*?STACK:(\d+)', usage.stdout + usage.stderr).groups()
    loop = longest_loop(listing.stdout)
    instructions = tuple(sorted(set(TENSOR_CORE.findall(compiled.asm['ptx']))))
    return Compiled(int(registers), int(stack), compiled.metadata.shared, len(loop), loop.count('LDL'), instructions)

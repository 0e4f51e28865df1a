"""`python -m zoo SCRIPT.py ...`: scripts as timm's run unmodified, with the zoo's models."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import zoo.__main__

TRAIN = Path(__file__).parent / 'scripts' / 'train.py'
TINY_VAN = ('--model', 'van_b0', '--model-kwargs', 'dims=(16,32,32,48)', 'depths=(1,1,2,1)')
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def python(*arguments, **kwargs):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **kwargs)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes of one colour each: 12 images to train on, 4 to test on."""
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 6), ('test', 2)):
        for label, colour in (('blue', (0, 0, 255)), ('red', (255, 0, 0))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new('RGB', (40, 36), colour).save(folder / f'{number}.png')
    return root


@pytest.fixture
def write(tmp_path):
    def write(text, name='script.py'):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def train(images, output, *arguments, launch=('-m', 'zoo')):
    run = python(
        *launch, TRAIN, images, *TINY_VAN, '--num-classes', 2, '--img-size', 32, '--output', output, *arguments
    )
    assert run.returncode == 0, run.stderr
    return json.loads((output / 'result.json').read_text())


def test_a_training_script_trains_a_zoo_model_with_spawned_workers_and_its_average_loads(images, tmp_path):
    result = train(images, tmp_path, '--model-ema', '--workers', 1, '--start-method', 'spawn', '--drop-path', 0.1)
    assert result['input_size'] == [3, 32, 32]
    assert result['ranks'] == 1
    path = tmp_path / 'model_best.pth.tar'
    model = timm.create_model('van_b0', dims=(16, 32, 32, 48), depths=(1, 1, 2, 1), num_classes=2, checkpoint_path=path)
    average = torch.load(path, weights_only=False)['state_dict_ema']
    assert all(torch.equal(value, average[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='needs gloo')
def test_a_training_script_trains_a_zoo_model_on_two_processes(images, tmp_path):
    launch = ('-m', 'torch.distributed.run', '--nproc-per-node', 2, '--standalone', '-m', 'zoo')
    result = train(images, tmp_path, '--batch-size', 3, '--layer-decay', 0.8, launch=launch)
    assert result['ranks'] == 2
    assert result['loss'] < 10
    assert (tmp_path / 'model_best.pth.tar').exists()


@pytest.mark.slow
def test_the_same_script_by_itself_does_not_know_the_model(images, tmp_path):
    run = python(TRAIN, images, *TINY_VAN, '--output', tmp_path)
    assert run.returncode == 1
    assert 'Unknown model (van_b0)' in run.stderr


def test_a_script_sees_what_python_would_show_it(write):
    """Its arguments, `__main__`, its folder first on the path, and neighbours to import; but the zoo is there."""
    write('', 'neighbour.py')
    script = write(
        'import json, sys, neighbour, __main__\n'
        'def here(): pass\n'
        'if __name__ == "__main__":\n'
        '    found = [sys.argv, __file__, sys.path[0], __main__.here is here, __spec__ is None]\n'
        '    print(json.dumps([found, "zoo" in sys.modules]))\n'
    )
    arguments = ('--flag', 'value', '-m', 'zoo')
    plain, ours = (json.loads(python(*way, script, *arguments).stdout) for way in ((), ('-m', 'zoo')))
    assert plain[0] == ours[0]
    assert (plain[1], ours[1]) == (False, True)


@pytest.mark.parametrize(
    ('method', 'depth'),
    [('spawn', 0), *(pytest.param(method, 1, marks=pytest.mark.slow) for method in ('spawn', 'forkserver', 'fork'))],
)
def test_processes_of_a_script_know_the_models(write, method, depth):
    """And those that they start; functions of `__main__` are found in them."""
    script = write(
        'import multiprocessing, sys, timm\n'
        'def work(queue, depth, context):\n'
        '    queue.put(type(timm.create_model("van_b0", device="meta")).__name__)\n'
        '    if depth:\n'
        '        start(queue, depth - 1, context)\n'
        'def start(queue, depth, context):\n'
        '    process = context.Process(target=work, args=(queue, depth, context))\n'
        '    process.start()\n'
        '    process.join()\n'
        'if __name__ == "__main__":\n'
        '    context, depth = multiprocessing.get_context(sys.argv[1]), int(sys.argv[2])\n'
        '    queue = context.Queue()\n'
        '    start(queue, depth, context)\n'
        '    print(*(queue.get(timeout=5) for _ in range(depth + 1)))\n'
    )
    run = python('-m', 'zoo', script, method, depth)
    assert run.stdout.split() == ['VAN'] * (depth + 1), run.stderr


@pytest.fixture
def main(monkeypatch):
    """`python -m zoo ARGUMENTS` in this process."""

    def main(*arguments):
        monkeypatch.setattr(sys, 'argv', ['zoo', *map(str, arguments)])
        monkeypatch.setattr(sys, 'path', list(sys.path))
        monkeypatch.setattr(multiprocessing.current_process(), '_config', {})
        return zoo.__main__.main()

    return main


@pytest.mark.parametrize('code', [0, 7, 'out of luck'])
def test_a_scripts_exit_is_that_of_the_command(main, write, code):
    script = write(f'import sys; sys.exit({code!r})')
    with pytest.raises(SystemExit) as exit:
        main(script)
    assert exit.value.code == code


@pytest.mark.parametrize(
    ('body', 'error', 'line'),
    [
        ('def deep():\n    open("no/such/file")\ndeep()', FileNotFoundError, 'line 2, in deep'),
        ('value = 1\ndef broken(:', SyntaxError, 'line 2'),
    ],
)
def test_a_traceback_names_the_script(main, write, body, error, line):
    script = write(body)
    with pytest.raises(error) as raised:
        main(script)
    assert f'File "{script}", {line}' in ''.join(traceback.format_exception(raised.value))


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
def test_an_interrupt_reaches_the_script(write, tmp_path):
    body = (
        'import pathlib, sys, time\n'
        'try:\n'
        '    pathlib.Path(sys.argv[1]).touch()\n'
        '    time.sleep(60)\n'
        'except KeyboardInterrupt:\n'
        '    print("tidied up")\n'
        '    raise\n'
    )
    ready = tmp_path / 'ready'
    command = [sys.executable, '-u', '-m', 'zoo', str(write(body)), str(ready)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # Tests that run in the background ignore interrupts, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output == 'tidied up\n'
    assert 'KeyboardInterrupt' in errors
    assert process.returncode == -signal.SIGINT


def test_a_missing_script_is_named_with_those_near(main, write, tmp_path, monkeypatch):
    write('', 'train.py')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no script 'trian.py' \(in .*\)\. Did you mean train.py\?"):
        main('trian.py')
    with pytest.raises(SystemExit, match=r"no script 'no/such.py' \(in .*\)\.$"):
        main('no/such.py')


def test_without_a_script_it_is_the_command_line(main, capsys):
    with pytest.raises(SystemExit) as exit:
        main('info', 'van_b0')
    assert exit.value.code == 0
    assert '2202.09741' in capsys.readouterr().out

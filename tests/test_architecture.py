"""The house: who may import whom, and what is installed."""

import ast
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
ROOMS = ('kernels', 'backbones', 'zoo', 'train')  # each may import those before it
FRONT_DOORS = {ROOT / 'zoo' / 'cli.py', ROOT / 'zoo' / '__init__.py'}  # these open every room, on use


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, its own included."""
    room = path.relative_to(ROOT).parts[0]
    package = ['zoo'] if room == 'zoo' else ['zoo', room]
    package += path.relative_to(ROOT).parts[1:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split('.') if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == 'zoo':
                rooms.add(name[1] if len(name) > 1 and name[1] in (*ROOMS, 'benchmarks') else 'zoo')
    return rooms


@pytest.mark.parametrize('room', ROOMS)
def test_rooms_import_downwards_only(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (ROOT / room).rglob('*.py'):
        if path not in FRONT_DOORS:
            assert imported_rooms(path) <= allowed, path


def test_kernels_know_torch_and_triton_alone():
    for path in (ROOT / 'kernels').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split('.')[0]
                known = top in ('torch', 'triton') or top in sys.stdlib_module_names
                assert known or name.startswith('zoo.kernels'), (path, name)


def test_every_folder_of_code_is_packaged():
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    packages = set()
    for room in (*ROOMS, 'benchmarks'):
        for init in (ROOT / room).rglob('__init__.py'):
            parts = init.parent.relative_to(ROOT).parts
            packages.add('.'.join(parts if parts[0] == 'zoo' else ('zoo', *parts)))
    assert packages | {'zoo.configs'} == set(config['packages'])


def site_packages(folder: Path) -> Path:
    """Where an environment in `folder`, which sees this one's packages, has its own."""
    venv.create(folder, system_site_packages=True, with_pip=False)
    target = next(folder.glob('lib/python*/site-packages'))
    others = [path for path in sys.path if path.endswith('site-packages')]
    (target / 'outer.pth').write_text('\n'.join(others))
    return target


def imports_from(python: Path, cwd: Path) -> Path:
    code = 'import zoo, timm, zoo.train; timm.create_model("van_b0", device="meta"); print(zoo.__file__)'
    result = subprocess.run([python, '-c', code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.split()[-1])


def test_the_wheel_holds_all_and_works_on_its_own(tmp_path):
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path / 'dist', str(ROOT)], check=True
    )
    (wheel,) = (tmp_path / 'dist').glob('attention_zoo-*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in ('backbones/catalogue/*.json', 'backbones/*.py', 'kernels/**/*.py', 'train/*.py', 'configs/**/*.py'):
        for path in ROOT.glob(pattern):
            assert f'zoo/{path.relative_to(ROOT)}' in names
    assert not {name.split('/')[0] for name in names} - {'zoo', wheel.name.split('-py3')[0] + '.dist-info'}
    target = site_packages(tmp_path / 'env')
    zipfile.ZipFile(wheel).extractall(target)
    python = tmp_path / 'env' / 'bin' / 'python'
    assert imports_from(python, tmp_path) == target / 'zoo' / '__init__.py'


def test_the_editable_install_runs_the_tree(tmp_path):
    environment = tmp_path / 'env'
    target = site_packages(environment)
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', target, '-e', str(ROOT)], check=True
    )
    assert imports_from(environment / 'bin' / 'python', tmp_path) == ROOT / 'zoo' / '__init__.py'

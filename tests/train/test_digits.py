import threading

import numpy as np
import pytest
from PIL import Image

from zoo.train import digits

sklearn_datasets = pytest.importorskip('sklearn.datasets')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return digits.write(tmp_path_factory.mktemp('data') / 'digits')


def read(folder, split):
    files = sorted((folder / split).glob('*/*.png'), key=lambda path: path.stem)
    images = np.stack([np.asarray(Image.open(path)) for path in files])
    return images, np.array([int(path.parent.name) for path in files])


def test_pictures_are_the_digits_in_their_order(folder):
    expected, expected_labels = sklearn_datasets.load_digits(return_X_y=True)
    images, labels = (np.concatenate(parts) for parts in zip(read(folder, 'train'), read(folder, 'test'), strict=True))
    assert images.dtype == np.uint8
    assert np.array_equal((images.reshape(1797, 64) / 255 * 16).round(), expected)
    assert np.array_equal(labels, expected_labels)


def test_logistic_regression_reaches_its_known_accuracy_on_the_split(folder):
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    (x, y), (x_test, y_test) = read(folder, 'train'), read(folder, 'test')
    assert (len(y), len(y_test)) == (1200, 597)
    with threadpool_limits(1):  # more threads take longer
        model = LogisticRegression(max_iter=500).fit(x.reshape(-1, 64) / 255, y)
    assert model.score(x_test.reshape(-1, 64) / 255, y_test) == pytest.approx(0.921, abs=0.002)


def test_writing_again_changes_nothing(folder):
    times = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert digits.write(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == times
    assert [path.name for path in folder.parent.iterdir()] == ['digits']


def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch):
    def fail(self, path):
        if '0100' in str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', fail)
    with pytest.raises(KeyboardInterrupt):
        digits.write(tmp_path / 'digits')
    assert not (tmp_path / 'digits').exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('')
    with pytest.raises(FileExistsError, match='not the folder of digits'):
        digits.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


def test_runs_at_the_same_time_both_succeed(tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(digits.write(tmp_path / 'digits'))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / 'digits'] * 2
    assert [path.name for path in tmp_path.iterdir()] == ['digits']

"""The benchmark of the operators measures functions that agree, and says so in a report and a table."""

from zoo.benchmarks import neighborhood
from zoo.benchmarks.timing import interleaved, peak_memory


def test_neighborhood_attention_is_measured_beside_the_gather(monkeypatch):
    eager = {'gather': neighborhood.gather, 'tiled': neighborhood.ours}
    monkeypatch.setattr(neighborhood, 'contenders', lambda case: (eager, {'forward only': neighborhood.ours}))
    report = neighborhood.measure({'small': neighborhood.Case(2, 15, 2, dilation=2, head_dim=8)}, rounds=1)
    functions = report['cases']['small']['functions']
    assert list(functions) == ['gather', 'tiled', 'forward only']
    assert functions['tiled']['forward'] > 0
    assert functions['tiled']['train'] > 0
    assert functions['forward only']['train'] is None
    assert {'date', 'processor', 'versions'} <= set(report['machine'])
    assert neighborhood.table(report).row_count == 3


def test_times_are_cpu_time_of_every_case():
    times = interleaved({'more': lambda: sum(range(200_000)), 'less': lambda: sum(range(1000))}, rounds=3)
    assert times['more'] > times['less'] > 0


def test_peak_memory_is_that_of_the_call():
    assert 60 << 20 <= peak_memory(lambda: bytearray(64 << 20).count(1)) < 80 << 20

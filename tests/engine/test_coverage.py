"""Coverage of a request, summed over its steps and phases and exported as metrics."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from keysift.attention import Coverage, Dense
from keysift.engine import Request, Sparsity
from keysift.engine.scheduling.sequence import Sequence
from keysift.kvcache import Phase
from tests.engine.driver import Make, drain, finish_of, greedy, tokens

SPARSE = ("threshold=0.1", "sink=16", "local=16", "last_rows_dense=0", "dense_below=0")


def sparsity(make: Make, length: int, new: int, *arguments: str, strategy: str = "sift") -> Sparsity:
    engine = make()
    engine.add(Request("a", tokens(length), greedy(new), strategy=strategy, strategy_args=arguments))
    return finish_of(drain(engine), "a").sparsity


def test_generated_tokens_that_read_everything_do_not_hide_what_the_prompt_lost(make: Make) -> None:
    short, long = (sparsity(make, 300, new, *SPARSE, "coverage=0") for new in (1, 100))
    assert short.coverage == long.coverage
    assert short.coverage is not None
    assert short.coverage_min is not None
    assert 0 < short.coverage_min < short.coverage < 1
    assert long.coverage_min == short.coverage_min
    assert long.widened == 0


def test_dense_chunks_of_a_prompt_count_as_kept(make: Make) -> None:
    """Chunks of 64: of 384 tokens with a `dense_below` of 128, the first four run dense."""
    all_sparse, half_sparse = (sparsity(make, 384, 1, *SPARSE[:-1], f"dense_below={below}") for below in (0, 128))
    assert all_sparse.coverage is not None
    assert half_sparse.coverage is not None
    assert half_sparse.prefill_density > all_sparse.prefill_density
    assert 0.6 < half_sparse.coverage < 1
    assert half_sparse.coverage > all_sparse.coverage
    assert not half_sparse.dense_fallback


def test_a_prompt_below_the_dense_threshold_keeps_everything(make: Make) -> None:
    found = sparsity(make, 60, 5)
    assert found.dense_fallback
    assert (found.coverage, found.coverage_min, found.widened) == (1.0, 1.0, 0.0)


def test_rows_that_keep_too_little_are_widened(make: Make) -> None:
    found = sparsity(make, 300, 5, *SPARSE[:-1], "dense_below=0", "coverage=1.0")
    assert found.widened > 0.2
    assert found.coverage is not None
    assert found.coverage > 0.999


@pytest.mark.parametrize("strategy", ["streaming", "dense+streaming", "sift+streaming"])
def test_one_unmeasured_phase_makes_the_coverage_unknown(make: Make, strategy: str) -> None:
    arguments = [f"{strategy.split('+')[-1]}.window=16", "streaming.sink=0"]
    found = sparsity(make, 300, 40, *arguments, strategy=strategy)
    assert found.coverage is found.coverage_min is None


def test_coverage_is_of_the_sparse_phases_alone() -> None:
    sequence = Sequence(Request("a", (1, 2, 3)), Dense(), 4)
    sequence.coverage[Phase.PREFILL] += Coverage(100, 100.0)
    assert sequence.sparsity().coverage == 1.0
    sequence.coverage[Phase.DECODE] += Coverage(4, 2.0, 0.25, 1.0, chose=True)
    found = sequence.sparsity()
    assert (found.coverage, found.coverage_min, found.widened) == (0.5, 0.25, 0.25)
    sequence.coverage[Phase.PREFILL] += Coverage(100, 80.0, 0.5, 0.0, chose=True)
    found = sequence.sparsity()
    assert found.coverage == pytest.approx(182 / 204)
    assert found.coverage_min == 0.25


def test_metrics_observe_the_coverage_of_each_request(make: Make) -> None:
    names = ("attention_coverage", "attention_coverage_min", "widened_share")

    def samples(field: str) -> list[float]:
        label = {"strategy": "sift"}
        return [REGISTRY.get_sample_value(f"keysift_{name}_{field}", label) or 0.0 for name in names]

    before, sums = samples("count"), samples("sum")
    found = sparsity(make, 300, 1, *SPARSE)
    assert [now - then for now, then in zip(samples("count"), before, strict=True)] == [1, 1, 1]
    expected = [found.coverage, found.coverage_min, found.widened]
    assert [now - then for now, then in zip(samples("sum"), sums, strict=True)] == pytest.approx(expected)

from __future__ import annotations

from chaos.memory import MIB, Growth, Sample, growth


def test_what_a_process_takes_while_it_settles_does_not_count() -> None:
    samples = [Sample(second, min(second, 600) * MIB) for second in range(0, 3600, 10)]
    assert growth(samples) == Growth(600.0, 600.0, 0.0)


def test_growth_counts_up_to_the_most_that_was_taken() -> None:
    samples = [Sample(second, (100 + second // 100) * MIB) for second in range(0, 3601, 10)]
    assert growth(samples) == Growth(106.0, 136.0, 30.0)


def test_a_short_run_settles_in_its_first_sixth() -> None:
    samples = [Sample(0, 0), Sample(9, 50 * MIB), Sample(11, 60 * MIB), Sample(60, 61 * MIB)]
    assert growth(samples) == Growth(60.0, 61.0, 1.0)

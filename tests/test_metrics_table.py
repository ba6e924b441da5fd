"""docs/metrics.md is what the registry says."""

from metrics_table import LEFT_OUT, PAGE, page

from phi3v_dist.observe.registry import REGISTRY


def test_the_page_is_what_the_registry_says() -> None:
    assert PAGE.read_text(encoding="utf-8").splitlines() == page().splitlines(), "run `make metrics`"


def test_every_metric_is_on_the_page_once() -> None:
    lines = page().splitlines()
    for metric in REGISTRY:
        assert sum(line.startswith(f"| `{metric.name}` |") for line in lines) == (not LEFT_OUT.fullmatch(metric.name))

"""Prices and what follows from them: every figure here can be redone by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from crab_platform.cost import (
    PROFILES,
    Prices,
    ProfileError,
    cache_pays,
    compute_cost,
    list_cost,
    load_profile,
    money,
    read_cost,
    store_cost,
)

PRICES = Prices(
    currency="EUR",
    cpu_hour=0.036,  # 1e-5 a second
    gpu_hour=3.6,  # 1e-3 a second
    storage_gb_month=0.02,
    put_per_1000=0.005,
    get_per_1000=0.0004,
    list_per_1000=0.005,
    egress_gb=0.09,
)


def profile(folder: Path, text: str) -> Path:
    path = folder / "ours.yaml"
    path.write_text(text)
    return path


def lines(**changes: object) -> str:
    values = PRICES.model_dump() | changes
    return "prices:\n" + "".join(f"  {name}: {value}\n" for name, value in values.items())


def test_costs_are_prices_times_amounts() -> None:
    assert compute_cost(100, 10, PRICES) == pytest.approx(100 * 1e-5 + 10 * 1e-3)
    assert store_cost(5e9, 3, 2000, PRICES) == pytest.approx(5 * 3 * 0.02 + 2 * 0.005)
    assert read_cost(5e9, 1000, False, PRICES) == pytest.approx(0.0004)
    assert read_cost(5e9, 1000, True, PRICES) == pytest.approx(0.0004 + 5 * 0.09)


def test_listing_costs_a_request_for_a_thousand_names_and_one_for_none() -> None:
    assert list_cost(0, PRICES) == list_cost(1000, PRICES) == pytest.approx(0.005 / 1000)
    assert list_cost(1001, PRICES) == pytest.approx(2 * 0.005 / 1000)


@pytest.mark.parametrize("amount", [-1.0, float("nan")])
def test_amounts_below_zero_are_refused(amount: float) -> None:
    with pytest.raises(ValueError, match="cpu_s"):
        compute_cost(amount, 0, PRICES)
    with pytest.raises(ValueError, match="bytes"):
        store_cost(amount, 1, 1, PRICES)


def test_a_cache_pays_from_the_reuses_that_cover_what_keeping_costs() -> None:
    # Again: 1 s of CPU and 0.1 s of GPU = 1.1e-4. Keeping 20 MB: 4e-4 and two writes of a pack of
    # 256 MiB shared with 12.4 others, 7.5e-7. Reading: 3 requests of 8 MiB, 1.2e-6.
    verdict = cache_pays(bytes_=20e6, decode_cpu_s=1, encode_gpu_s=0.1, prices=PRICES)
    assert verdict.recompute == pytest.approx(1.1e-4)
    assert verdict.keep == pytest.approx(4e-4 + 2 * 20e6 / (256 << 20) * 0.005 / 1000)
    assert verdict.read == pytest.approx(3 * 0.0004 / 1000)
    assert verdict.reuses == 4  # 4.00745e-4 / 1.088e-4 = 3.68
    assert verdict.sentence == (
        "caching pays from 4 reuses a month on: computing a clip again costs 0.000110 EUR, keeping "
        "its 20 MB for a month 0.000401 EUR, reading it 0.00000120 EUR"
    )


@pytest.mark.parametrize("reuses", [1, 2, 3, 17])
def test_at_that_many_reuses_the_cache_is_cheaper_and_at_one_less_it_is_not(reuses: int) -> None:
    cpu_s = 40.0 / (reuses - 0.5) + 0.12
    verdict = cache_pays(bytes_=20e6, decode_cpu_s=cpu_s, prices=PRICES)
    assert verdict.reuses == reuses
    assert reuses * verdict.recompute >= verdict.keep + reuses * verdict.read
    fewer = reuses - 1
    assert fewer * verdict.recompute < verdict.keep + fewer * verdict.read


def test_a_cache_never_pays_when_reading_costs_more_than_computing() -> None:
    far = cache_pays(bytes_=20e6, decode_cpu_s=1, prices=PRICES, egress=True)
    assert far.reuses is None
    assert far.sentence.startswith("caching never pays at these prices: reading a clip costs 0.00")
    free = Prices(**dict.fromkeys(PRICES.model_dump(), 0.0) | {"currency": "EUR"})
    assert cache_pays(bytes_=20e6, decode_cpu_s=1, prices=free).reuses is None


def test_a_cache_that_costs_nothing_to_keep_pays_from_the_first_reuse() -> None:
    free = PRICES.model_copy(update={"storage_gb_month": 0.0, "put_per_1000": 0.0})
    verdict = cache_pays(bytes_=20e6, decode_cpu_s=1, prices=free)
    assert verdict.reuses == 1
    assert "from 1 reuse a month on" in verdict.sentence


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 USD"),
        (0.00001234, "0.0000123 USD"),
        (0.5, "0.500 USD"),
        (12.345, "12.35 USD"),
        (37879.2, "37,879 USD"),
    ],
)
def test_money_has_three_digits_and_no_exponent(amount: float, text: str) -> None:
    assert money(amount, "USD") == text


@pytest.mark.parametrize("name", ["aws-example", "laptop"])
def test_the_shipped_profiles_load_by_name_and_by_path(name: str) -> None:
    found = load_profile(name)
    assert found.name == name
    assert found == load_profile(PROFILES / f"{name}.yaml")


@pytest.mark.parametrize("name", ["aws-example", "laptop"])
def test_every_shipped_price_has_a_comment_with_a_date_above_it(name: str) -> None:
    comment = ""
    unexplained = set(Prices.model_fields) - {"currency"}
    for line in (PROFILES / f"{name}.yaml").read_text().splitlines():
        if line.startswith("  #"):
            comment += line
        elif line.startswith("  "):
            key = line.split(":")[0].strip()
            # The requests of a laptop share one comment, so it stays until the next begins.
            if "2026-" in comment:
                unexplained.discard(key)
            if name != "laptop":
                comment = ""
    assert not unexplained


def test_a_profile_may_hold_the_other_sections_of_a_cluster(tmp_path: Path) -> None:
    others = (
        "namespace: team\nqueue: q\nimage: i\nnode_groups: {}\nbucket: s3://b\nmlflow: http://m\n"
    )
    found = load_profile(profile(tmp_path, others + lines()))
    assert found.name == "ours"
    assert found.prices == PRICES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(gpu_hours=1), r"prices\.gpu_hours: unknown key; did you mean 'gpu_hour'\?"),
        ("name_space: a\n" + lines(), r"name_space: unknown key; did you mean 'namespace'\?"),
        (lines(cpu_hour=-1), r"prices\.cpu_hour: .*greater than or equal to 0"),
        (lines(cpu_hour=".inf"), r"prices\.cpu_hour: .*finite"),
        (lines(cpu_hour="'0.1 USD'"), r"prices\.cpu_hour: is '0.1 USD'; expected a number"),
        (lines(cpu_hour="true"), r"prices\.cpu_hour: is True; expected a number"),
        (lines(currency="dollars"), r"prices\.currency"),
        ("prices: {currency: USD}\n", r"prices\.cpu_hour: Field required"),
        ("namespace: a\n", "expected a mapping with a section `prices:`"),
        ("- a\n", "expected a mapping with a section `prices:`"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        load_profile(profile(tmp_path, text))


def test_an_absent_profile_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="did you mean 'laptop'"):
        load_profile("labtop")
    with pytest.raises(ProfileError, match="cannot read the profile"):
        load_profile(tmp_path / "none.yaml")

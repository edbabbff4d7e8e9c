"""The families of docs/models.md: each goes through the pipeline, or is refused before anything is written."""

import families
import pytest

PAGE = families.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_does_what_the_page_says(name, tmp_path):
    assert families.row(name, families.run_family(name, tmp_path)) in PAGE.splitlines()


def test_the_page_has_every_family_and_no_other():
    named = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("|")]
    assert named == ["family", "---", *families.FAMILIES]

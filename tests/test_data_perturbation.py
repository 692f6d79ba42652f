import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbcore.data import Condition, DataError, Perturbation
from perturbcore.data.perturbation import is_control_spelling

gene_names = st.text(
    st.characters(codec="ascii", categories=("Lu", "Ll", "Nd"), include_characters="-_."), min_size=1
).filter(lambda name: not is_control_spelling(name))


@given(st.lists(gene_names, min_size=1, max_size=4))
def test_a_perturbation_is_a_set_of_genes_and_survives_its_own_text(genes: list[str]) -> None:
    perturbation = Perturbation(tuple(genes))
    assert perturbation == Perturbation(tuple(reversed(genes)))
    assert hash(perturbation) == hash(Perturbation(tuple(genes + genes)))
    assert perturbation.genes == tuple(sorted(set(genes)))
    assert Perturbation.parse(str(perturbation)) == perturbation


@pytest.mark.parametrize(
    ("label", "genes"),
    [
        ("A", ("A",)),
        ("A+B", ("A", "B")),
        ("B+A", ("A", "B")),
        ("A+ctrl", ("A",)),
        ("ctrl+A", ("A",)),
        ("A|B", ("A", "B")),
        ("A_B", ("A", "B")),
        ("A_ctrl", ("A",)),
        ("A+A", ("A",)),
        ("X_Y", ("X_Y",)),  # neither X nor Y is known, and an underscore is legal in a name
        ("N_1", ("N_1",)),  # itself known
        ("ctrl", ()),
        ("ctrl+ctrl", ()),
        ("non-targeting", ()),
        ("Non_Targeting", ()),
        ("CTRL", ("CTRL",)),  # a human gene
    ],
)
def test_parse_reads_every_spelling(label: str, genes: tuple[str, ...]) -> None:
    assert Perturbation.parse(label, known={"A", "B", "N", "1", "N_1"}).genes == genes


def test_underscore_splits_nothing_when_no_gene_is_known() -> None:
    assert Perturbation.parse("A_B").genes == ("A_B",)


def test_a_declared_control_is_the_only_one() -> None:
    assert Perturbation.parse("CTRL", control="CTRL").is_control
    assert Perturbation.parse("DMSO", control="ctrl").genes == ("DMSO",)
    assert Perturbation.parse("A+WT", control="WT").genes == ("A",)


@pytest.mark.parametrize("label", ["", "  ", "A+", "+", "A::B"])
def test_parse_refuses_what_names_no_gene(label: str) -> None:
    with pytest.raises(DataError) as caught:
        Perturbation.parse(label)
    assert not label.strip() or repr(label) in str(caught.value)


def test_kinds_order_and_text() -> None:
    control, single, double = Perturbation(), Perturbation(("B",)), Perturbation(("B", "A"))
    assert (control.is_control, single.is_single, double.is_double) == (True, True, True)
    assert sorted([single, double, control]) == [control, double, single]
    assert str(control) == "control"
    assert str(Condition("K562", double)) == "K562::A+B"


def test_importing_the_data_layer_reads_no_anndata() -> None:
    code = "import sys, perturbcore.data; print(sorted({'anndata', 'pandas', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

"""Reports cut into sentences, and sentences turned into their contraries."""

import pytest

from medctkit.phantom.study import generate
from medctkit.training.report_sentences import contrary, sentences_of


@pytest.mark.parametrize(
    ("stated", "denied"),
    [
        ("Pleural effusion is seen.", "Pleural effusion is not seen."),
        ("There is a nodule in the left upper lobe, 8 mm.", "There is no nodule in the left upper lobe, 8 mm."),
        ("There are enlarged lymph nodes.", "There are no enlarged lymph nodes."),
        ("The lungs show a mosaic attenuation pattern.", "The lungs show no mosaic attenuation pattern."),
        ("The examination was made with breath artefacts.", "The examination was made without breath artefacts."),
    ],
)
def test_a_contrary_denies_what_is_stated_and_states_what_is_denied(stated, denied):
    assert contrary(denied).replace(" a ", " ") == stated.replace(" a ", " ")
    if "without" not in denied:
        assert contrary(stated) == denied


def test_short_forms():
    assert contrary("No consolidation is seen.") == "Consolidation is seen."
    assert contrary("Plate atelectasis.") == "No Plate atelectasis."
    assert contrary("") == "No "


@pytest.mark.parametrize("hospital", ["source", "target"])
def test_every_sentence_of_a_report_has_another_one_for_its_contrary(hospital):
    for seed in range(20):
        report = generate(seed, hospital, shape=(8, 16, 16)).report
        sentences = sentences_of(report)
        assert " ".join(sentences) == report and all(s.endswith(".") for s in sentences)
        assert all(contrary(s) != s for s in sentences)

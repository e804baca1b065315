"""The tables of evaluations and datasets agree with the modules and the commands."""

from importlib import import_module

import pytest
from typer.testing import CliRunner

from llamory.cli import app
from llamory.evaluation import EVALUATIONS
from llamory.evaluation.datasets import DATASETS
from llamory.evaluation.results import ResultsFile


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_has_results_a_function_and_a_command(name: str) -> None:
    module = import_module(EVALUATIONS[name])
    results = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, ResultsFile)]
    assert name in [getattr(each, "evaluation", None) for each in results]
    assert callable(module.evaluate)
    assert CliRunner().invoke(app, ["eval", name, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_has_pairs_and_a_command(name: str) -> None:
    module, _, function = DATASETS[name].rpartition(".")
    assert callable(getattr(import_module(module), function))
    assert CliRunner().invoke(app, ["dataset", name, "--help"]).exit_code == 0

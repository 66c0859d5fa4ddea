"""Recipes: text, YAML, JSON Schema, and errors that suggest the right word."""

import json

import jsonschema
import pytest
import yaml

from onnxslim_lab.errors import LabError, ParameterError, RecipeError
from onnxslim_lab.passes import PASSES
from onnxslim_lab.recipe import Recipe, json_schema, parse_step, step_text

FULL = """
version: 1
steps:
  - simplify
  - prune: {sparsity: 0.9, scope: layer}
  - share: {bits: 3}
  - encode:
verify: end
seed: 7
memory: 2000000
"""


def test_yaml_there_and_back():
    recipe = Recipe.parse(FULL)
    assert [type(step).pass_name() for step in recipe.steps] == ["simplify", "prune", "share", "encode"]
    assert (recipe.verify, recipe.seed, recipe.steps[1].sparsity) == ("end", 7, 0.9)
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.pass_name())
def test_every_pass_round_trips_as_text_yaml_and_json(kind):
    step = kind()
    assert parse_step(step_text(step)) == step
    assert kind.model_validate_json(step.model_dump_json()) == step
    assert Recipe.parse(Recipe(steps=(step,)).to_yaml()).steps == (step,)


def test_command_line_text():
    assert parse_step("prune: sparsity=0.5 , scope=row").scope == "row"
    assert parse_step("simplify:skip=[fuse-linear, encode-not]".replace(", encode-not", "")).skip == (
        "fuse-linear",
    )
    assert step_text(parse_step("fold-constants:allow_growth=true")) == "fold-constants:allow_growth=true"


WRONG_TEXT = {
    "prun:sparsity=0.5": "unknown pass 'prun'; did you mean 'prune'?",
    "prune:sparsty=0.5": "unknown parameter 'sparsty'; did you mean 'sparsity'?",
    "prune:sparsity": "must be key=value",
    "prune:sparsity=1.5": "'sparsity'",
    "prune:sparsity=0.5,sparsity=0.6": "given twice",
    "share:bits=nine": "'bits'",
    "simplify:skip=fuse-linaer": "did you mean 'fuse-linear'?",
    "": "unknown pass ''",
}


@pytest.mark.parametrize("text", WRONG_TEXT)
def test_wrong_text_is_refused_in_one_line(text):
    with pytest.raises(ParameterError) as caught:
        parse_step(text)
    assert WRONG_TEXT[text] in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_YAML = {
    "stepz: [simplify]": "unknown key 'stepz'; did you mean 'steps'?",
    "steps: [simplfy]": "steps[0] unknown pass 'simplfy'; did you mean 'simplify'?",
    "steps: [simplify, {prune: {sparsty: 1}}]": "steps[1] prune: unknown parameter 'sparsty'; did you mean 'sparsity'?",
    "steps: []": "must be a list of passes",
    "steps: simplify": "must be a list of passes",
    "steps: [{prune: {}, share: {}}]": "steps[0] must be a pass name",
    "steps: [simplify]\nverify: sometimes": "'verify'",
    "steps: [simplify]\nseed: -1": "'seed'",
    "version: 2\nsteps: [simplify]": "version must be 1",
    "[": "not valid YAML",
    "- a": "must be a mapping",
    "steps: [!!python/object/apply:os.system [echo]]": "not valid YAML",
}


@pytest.mark.parametrize("text", WRONG_YAML)
def test_wrong_recipes_are_refused_in_one_line(text):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert WRONG_YAML[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(tmp_path / "binary.yaml")
    (tmp_path / "big.yaml").write_bytes(b" " * (1 << 21))
    with pytest.raises(LabError, match="larger"):
        Recipe.load(tmp_path / "big.yaml")


def test_json_schema_accepts_what_parse_accepts():
    schema = json.loads(json.dumps(json_schema()))
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(yaml.safe_load(FULL))
    for text in ("stepz: [simplify]", "steps: [simplfy]", "steps: [{prune: {sparsty: 1}}]", "steps: []"):
        assert not validator.is_valid(yaml.safe_load(text)), text

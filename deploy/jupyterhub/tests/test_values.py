"""The values for zero-to-jupyterhub: valid against the chart's schema, and their Python is what KubeSpawner takes."""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from traitlets.config import Config

from jupyterhub_upperdeck.kube import UpperdeckKubeSpawner
from jupyterhub_upperdeck.pull import PullSecrets

TREE = Path(__file__).resolve().parents[3]
CHART = TREE.parent / "shared/z2jh"


@pytest.fixture
def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((TREE / "deploy/jupyterhub/values.yaml").read_text())
    return found


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns values as Helm merges them."""
    made = dict(one)
    for name, value in other.items():
        old = made.get(name)
        made[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return made


def test_they_are_valid_by_the_charts_own_schema(values: dict[str, Any]) -> None:
    """The schema is third-party and in no package of PyPI, npm or Go: it is read where a copy of the chart is."""
    chart = Path(os.environ.get("Z2JH_CHART", CHART))
    if not chart.exists():
        pytest.skip(f"the chart's schema is not at {chart}")
    schema = yaml.safe_load((chart / "values.schema.yaml").read_text())
    # Helm validates what the chart's defaults and ours are together.
    defaults = yaml.safe_load((chart / "values.yaml").read_text())
    jsonschema.validate(merged(defaults, values), schema)
    # It is one that refuses what is wrong.
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(defaults, {"hub": {"upperdeck": True}}), schema)


def test_their_python_sets_the_spawner(values: dict[str, Any]) -> None:
    config = Config()
    exec(values["hub"]["extraConfig"]["upperdeck"], {"c": config})
    for name, settings in values["hub"]["config"].items():
        config[name].update(settings)
    assert config.JupyterHub.spawner_class == f"jupyterhub_upperdeck.kube.{UpperdeckKubeSpawner.__name__}"
    assert callable(config.KubeSpawner.profile_list)
    assert isinstance(config.UpperdeckKubeSpawner.upperdeck_pull_secrets, PullSecrets)
    known = UpperdeckKubeSpawner.class_trait_names(config=True)
    assert set(config.UpperdeckMixin) | {"upperdeck_pull_secrets"} <= set(known)
    [port] = values["hub"]["service"]["extraPorts"]
    service = values["hub"]["services"]["upperdeck"]
    assert service["url"].endswith(f":{port['port']}")
    assert service["command"][-1].endswith(f":{port['targetPort']}")

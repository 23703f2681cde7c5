"""The weights rule itself, against the values recorded with the fixtures."""
import json

import pytest

from tests.support import parity


@pytest.mark.parametrize("network", ["eft", "vldm", "vae", "unet_small"])
def test_rule_regenerates_the_recorded_weights(network):
    check = json.loads(parity.path("weights_check.json").read_text())
    check = {name: (first, total) for name, first, total in check[network]["entries"]}
    entries = parity.manifest(network)["entries"]
    assert len(entries) == len(check)
    for name, shape, _ in entries[:: 7 if network == "vldm" else 1]:  # a seventh of the 400 M numbers is enough
        w = parity.weight(name, shape)
        first, total = check[name]
        assert abs(float(w.flatten()[0]) - first) <= 1e-7, name
        assert abs(float(w.double().sum()) - total) <= 1e-4, name

"""A key on a PKCS#11 token signs; with SoftHSM, where that and PyKCS11 are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from tests.serving.signing.conftest import make_pair

MODULES = [*Path("/usr/lib").glob("softhsm/libsofthsm2.so"), *Path("/usr/lib").glob("*/softhsm/libsofthsm2.so")]


@pytest.mark.acceptance
def test_a_key_on_a_token(exported, keys, tmp_path, monkeypatch):
    pytest.importorskip("PyKCS11")
    if not MODULES or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM is not installed")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    pair = make_pair(tmp_path, "release")
    for words in (
        ["--init-token", "--free", "--label", "sentei", "--so-pin", "5678"],
        ["--import", pair.private, "--token", "sentei", "--label", "release", "--id", "01"],
    ):
        subprocess.run(["softhsm2-util", "--module", MODULES[0], *words, "--pin", "1234"], check=True, timeout=60)
    (tmp_path / "pin").write_text("1234")
    (tmp_path / "pin").chmod(0o600)
    uri = f"pkcs11:token=sentei;object=release?module-path={MODULES[0]}&pin-source={tmp_path / 'pin'}"
    assert sentei("sign", exported, "--key", uri).returncode == 0
    assert sentei("verify", exported, "--signature", pair.public).returncode == 0
    assert sentei("verify", exported, "--signature", keys.public).returncode == 1
    (tmp_path / "pin").write_text("9999")
    refused(sentei("sign", exported, "--key", uri, "--force"), "CKR_PIN_INCORRECT")
    assert sentei("verify", exported, "--signature", pair.public).returncode == 0

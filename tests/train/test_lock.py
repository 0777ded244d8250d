import subprocess
import sys

import pytest

from research.errors import FlagError
from research.train.lock import lock


def test_lock_names_the_holder_and_dies_with_it(tmp_path, capsys):
    script = f"""
import sys, time
from research.train.lock import lock
with lock({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FlagError, match=f"pid {holder.pid} on "), lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    capsys.readouterr()
    with lock(tmp_path):
        assert f"pid {holder.pid}" in capsys.readouterr().err
    with lock(tmp_path):
        assert capsys.readouterr().err == ""

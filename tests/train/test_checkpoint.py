import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import ModelError
from research.train import checkpoint, integrity
from research.train.checkpoint import Checkpointer
from tests.train import toy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2 and the states saved there."""
    folder = tmp_path_factory.mktemp("saved")
    s, frozen, stepper = toy.setup()
    states, saver, stepper = {}, Checkpointer(folder, keep=2), jax.jit(stepper)
    for k in (1, 2):
        s, _ = stepper(s, frozen, toy.batch(k))
        states[k] = s
        saver.save(k, s, {"identity": {"lr": 0.1, "method": {"rank": 8}}, "data": k})
    return folder, states


@pytest.fixture
def copy(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", states


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_restores_every_bit(saved):
    folder, states = saved
    saver = Checkpointer(folder)
    assert saver.latest_step() == 2
    for k in (1, 2):
        state, meta = saver.restore(k, jax.eval_shape(lambda: toy.setup()[0]))
        assert toy.same(state, states[k]) and jax.tree.structure(state) == jax.tree.structure(states[k])
        assert meta["data"] == k
    draw = lambda s: jax.random.normal(s.rng, (3,))  # noqa: E731
    assert toy.same(draw(state), draw(states[2]))


def test_dtypes_survive(tmp_path):
    tree = {
        "a": jnp.arange(5, dtype=jnp.bfloat16),
        "b": jnp.asarray([True, False]),
        "c": jnp.zeros((0, 3)),
        "d": jnp.int8(3),
    }
    Checkpointer(tmp_path).save(0, tree, {})
    assert toy.same(Checkpointer(tmp_path).restore(0, tree)[0], tree)


def test_no_folder_or_an_empty_one_is_a_fresh_start(tmp_path):
    assert Checkpointer(tmp_path / "none").latest_step() is None
    (tmp_path / "9").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "7").write_text("")
    (tmp_path / ".saving-3" / "state").mkdir(parents=True)
    assert Checkpointer(tmp_path).latest_step() is None


def test_any_damage_to_any_file_falls_back_with_its_reason(saved, tmp_path, capsys):
    """Each file of the newest step with a flipped bit, emptied, halved and deleted."""
    folder, states = saved
    shutil.copytree(folder, tmp_path / "run")
    saver, names = Checkpointer(tmp_path / "run"), files(folder / "2")
    assert len(names) > 8
    for name in names:
        path = tmp_path / "run" / "2" / name
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1 << (len(good) % 8)
        for bad in (bytes(flipped), b"", good[: len(good) // 2], None):
            path.unlink() if bad is None else path.write_bytes(bad)
            assert saver.latest_step() == 1, (name, bad)
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and "step 2" in err and name in err
            path.write_bytes(good)
    assert saver.latest_step() == 2
    state, _ = saver.restore(1, states[1])
    assert toy.same(state, states[1])


def test_two_hundred_flipped_bits_are_all_found(copy):
    folder, _ = copy
    rng, names = np.random.default_rng(0), files(folder / "2")
    for _ in range(200):
        path = folder / "2" / names[rng.integers(len(names))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        assert integrity.fault(folder / "2", 2) is not None, path
        path.write_bytes(good)


def test_wrong_values_from_orbax_are_caught_by_leaf(copy, monkeypatch):
    folder, states = copy
    real = checkpoint._orbax

    def wrong(action, path, leaves):
        out = real(action, path, leaves)
        out["trainable/peft/w/a"] += 1
        return out

    monkeypatch.setattr(checkpoint, "_orbax", wrong)
    with pytest.raises(ModelError, match="wrong values: trainable/peft/w/a"):
        Checkpointer(folder).restore(2, states[2])


def test_when_all_are_damaged_it_never_starts_from_zero(copy):
    folder, _ = copy
    (folder / "1" / "integrity.json").unlink()
    (folder / "2" / "integrity.json").write_text("{}")
    with pytest.raises(ModelError) as error:
        Checkpointer(folder).latest_step()
    assert "step 1: integrity.json is missing" in str(error.value) and "step 2" in str(error.value)


def test_another_run_is_refused_with_the_differing_names(saved):
    folder, states = saved
    expect = {"identity": {"lr": 0.1, "method": {"rank": 4}}}
    with pytest.raises(ModelError, match="identity/method/rank is 8 there and 4 here") as error:
        Checkpointer(folder).restore(2, states[2], expect)
    assert "lr" not in str(error.value)
    Checkpointer(folder).restore(2, states[2], {"identity": {"lr": 0.1, "method": {"rank": 8}}})


def test_another_structure_is_refused_with_the_differing_leaves(saved):
    folder, states = saved
    state = states[2]
    head = {"h": {"kernel": jnp.zeros((toy.D, 3), jnp.bfloat16), "extra": jnp.zeros(1)}}
    with pytest.raises(ModelError) as error:
        Checkpointer(folder).restore(2, state.replace(trainable=state.trainable | {"head": head}))
    text = str(error.value)
    assert "trainable/head/h/kernel is float32[8, 1], wanted bfloat16[8, 3]" in text
    assert "trainable/head/h/extra missing" in text and "trainable/head/h/bias unexpected" in text


def test_a_kill_between_removing_a_step_and_renaming_its_successor_loses_nothing(copy):
    folder, states = copy
    shutil.rmtree(folder / "1")
    (folder / "2").rename(folder / ".saving-2")
    saver = Checkpointer(folder)
    assert saver.latest_step() == 2 and toy.same(saver.restore(2, states[2])[0], states[2])


def test_keeps_the_newest_and_cleans_up(tmp_path):
    saver = Checkpointer(tmp_path, keep=2)
    for k in range(1, 4):
        saver.save(k, {"x": jnp.full(3, k)}, {})
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]
    (tmp_path / "3" / "integrity.json").write_text("")
    (tmp_path / ".saving-9").mkdir()
    saver.save(4, {"x": jnp.full(3, 4)}, {})
    # The damaged step does not count as one of the two.
    assert sorted(os.listdir(tmp_path)) == ["2", "4"]


def test_a_full_disk_is_one_line_and_earlier_steps_stay(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse the write, wherever Orbax does it."""
    script = f"""
import resource, signal, jax.numpy as jnp, jax
from research.errors import ModelError
from research.train.checkpoint import Checkpointer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
saver = Checkpointer({str(tmp_path)!r})
tree = {{"x": jax.random.normal(jax.random.key(0), (300, 300))}}
saver.save(1, tree, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    saver.save(2, tree, {{}})
except ModelError as error:
    print("ONE LINE", str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
print("LATEST", saver.latest_step())
saver.save(2, tree, {{}})
print("THEN", saver.latest_step())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("ONE LINE"))
    assert str(tmp_path) in line and "bytes free" in line and "step 2" in line
    assert "LATEST 1" in done.stdout and "THEN 2" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_sharded_leaves_come_back_on_another_mesh(tmp_path):
    devices = jax.devices()
    if len(devices) < 8:
        pytest.fail("the tests need 8 (fake) devices")
    from research.train import mesh as meshes

    eight, four = meshes.make_mesh("fsdp:8"), meshes.make_mesh("fsdp:2,data:2", devices[:4])
    values = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    place = lambda mesh: meshes.shardings({"w": ("embed", "rank")}, values, mesh)  # noqa: E731
    Checkpointer(tmp_path).save(1, meshes.shard(values, place(eight)), {})
    wanted = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=place(four)["w"])}
    back, _ = Checkpointer(tmp_path).restore(1, wanted)
    assert toy.same(back, values) and back["w"].sharding == place(four)["w"]


def test_meta_is_json_beside_the_state(saved):
    folder, _ = saved
    assert Checkpointer(folder).meta(2)["identity"]["lr"] == 0.1
    assert json.loads((folder / "2" / "integrity.json").read_text())["leaves"]["rng"]["dtype"] == "uint32"

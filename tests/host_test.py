import dataclasses
import json

from prolong_jax.data.mixture import Position
from prolong_jax.host import Host
from prolong_jax.reset_rules import Evaluation, History
from prolong_jax.rollout import Cursor
from prolong_jax.stages import Progress
from tests.rollout_test import group


def test_all_of_a_host_survives_json():
    evaluations = (Evaluation(2, 0.1, 0.0, 0.2), Evaluation(4, 1 / 3, 0.1, 0.7))
    host = Host(
        progress=Progress(step=7, stage=2, stage_start=5, last_reset=6, best=evaluations[1]),
        history=History(evaluations, kl=(0.1, 1 / 3), entropy=(0.7,), terminated=(1.0, 0.9)),
        cursor=Cursor(Position(9, {"a": 3}, {"x": [1.5, 2]}), [group([0.0, 1 / 3])]),
        base={"all": {"avg_at_k": 0.1}},
        resets=[{"step": 6, "reason": "kl", "values": {"kl": 0.1}}],
        skipped_in_a_row=1,
        entropy=0.7,
        entropy_shift=-0.01,
        samples=2,
        generated_tokens=3,
        wall_s=4.5,
        rl_wall_s=5.5,
        phases_s={"sample": 1 / 3},
    )
    for part in (host, host.progress, host.history, host.cursor, host.cursor.position):
        for field in dataclasses.fields(part):  # so that no new one is forgotten here
            assert getattr(part, field.name) != getattr(type(part)(), field.name), field.name
    assert Host.from_dict(json.loads(json.dumps(host.to_dict()))) == host

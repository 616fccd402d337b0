"""What a study says on a terminal while its works are under way."""

from types import SimpleNamespace

from mmtard.distributed.interruption import Interruption
from mmtard.distributed.progress import WorkProgress
from mmtard.study.here import Crew


def test_a_study_says_what_is_under_way_and_how_much_is_done(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(WorkProgress, "part", lambda self, words, total, done: told.append((total, done)))
    monkeypatch.setattr(WorkProgress, "advance", lambda self, amount=1.0: told.append(amount))
    monkeypatch.setattr(WorkProgress, "say", lambda self, words: told.append(words))
    items = [
        SimpleNamespace(phase="tuning", words=f"tecoa, seed {n}", done=not n, asked={"name": f"{n}"}, works=[{}])
        for n in range(3)
    ]
    study = SimpleNamespace(ranks=1, threads=1, at_once=1)
    with Interruption() as interruption, Crew(study, tmp_path, interruption) as crew:
        [team] = crew.teams
        seen = []
        team.start = lambda: None
        team.ask = lambda work: seen.append([item.words for item in crew.under_way]) or (0, "")
        crew.do(items)
    assert seen == [["tecoa, seed 1"], ["tecoa, seed 2"]] and not crew.under_way
    assert told[0] == (3, 1) and told.count(1.0) == 2
    assert {words for words in told if isinstance(words, str)} <= {
        "", "tuning: tecoa, seed 1", "tuning: tecoa, seed 2", "tuning: tecoa, seed 1 and 1 more",
    }  # fmt: skip

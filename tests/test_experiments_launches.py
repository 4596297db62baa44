"""Launches of a decode step's functions on a GPU, counted without one: a chain of torch's operations would show."""

import sys

from experiments.measure import cuda_launches


def test_a_norm_and_a_softmax_are_few_launches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda_launches"])
    cuda_launches.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["of", "party", "launches", "in_torch", "mostly"]
    launches = [int(line.split("owner" if "owner" in line else "client")[1].split()[0]) for line in lines]
    assert len(launches) == 4
    assert all(60 < count <= 110 for count in launches[:2]) and all(30 < count <= 65 for count in launches[2:])

from pathlib import Path

from toolchain.resuming import interrupted, made_otherwise


def test_the_sentences_say_what_lies_there_and_how_to_go_on():
    there = interrupted(Path("out.heal"), "healing")
    assert there.message == "out.heal holds an interrupted healing."
    assert there.hint == "Add --resume to go on from there, or --force to start over."
    other = made_otherwise(Path("out.search"), "searched", "seed: 0 then, 1 now")
    assert other.message == "out.search was searched with another seed: 0 then, 1 now."
    assert other.hint == "Run the same command as before, or use --force to start over."

from fpforensics.common.words import counted


def test_one_is_no_plural() -> None:
    assert [counted(number, "prompt") for number in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]

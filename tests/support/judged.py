"""What the checks of exercises say of an answer."""

from medctkit.course.exercises import judge


def is_right(name, *answer):
    """The praise of a right answer."""
    found = judge(name, *answer)
    assert found.state == "right", found.text
    return found.text


def is_wrong(name, *answer, because):
    """A wrong answer, told what is wrong with it."""
    found = judge(name, *answer)
    assert found.state == "wrong"
    assert because in found.text, found.text


def is_open(name, *answer):
    """What is said of an answer that is not there."""
    found = judge(name, *answer)
    assert found.state == "open"
    return found.text

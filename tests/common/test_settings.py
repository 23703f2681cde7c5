"""Settings of two runs: what differs, and what may."""
from common.settings import differences

SHORT = {"seed": 1, "config": {"iterations": 3, "bootstrap": 2, "blur": 5, "betas": (0.9, 0.99)}}


def changed(**config):
    """The settings with other numbers in the config."""
    return SHORT | {"config": SHORT["config"] | config}


def test_the_same_whatever_wrote_them():
    assert differences(SHORT, changed(betas=[0.9, 0.99])) == "" and differences({}, {}) == ""


def test_what_differs_is_said():
    assert differences(SHORT, SHORT | {"seed": 2}) == "seed differ: seed is 1 there, 2 here"
    words = differences(changed(old=None), SHORT | {"given": "x" * 50, "config": {}})
    assert words.startswith('given, config differ: given is null there, "xxxxxxxxxxxxxxxxxxxxxxx here, ')
    assert words.endswith(", ...") and words.count(" there, ") == 3
    assert differences([], SHORT) and differences(None, SHORT) and differences("text", SHORT)


def test_some_may_differ():
    assert differences(SHORT, changed(blur=6), ignore=("seed", "config.blur")) == ""
    assert differences(SHORT, changed(blur=6), ignore=("blur",))


def test_more_iterations_resume_fewer():
    longer = changed(iterations=9, bootstrap=6)
    assert differences(SHORT, longer, extend=True) == "" and differences(SHORT, longer)
    assert differences(longer, SHORT, extend=True) and differences(SHORT, changed(bootstrap=1), extend=True)
    assert differences(SHORT, longer | {"seed": 2}, extend=True)
    assert differences({}, longer, extend=True)


def test_settings_of_an_earlier_name_are_the_same():
    before, now, other = (changed(sampler=x) for x in ({"plms_steps": 2}, {"denoise_steps": 2}, {"denoise_steps": 4}))
    assert differences(before, now) == ""
    assert differences(before, other) == "config differ: config.sampler.denoise_steps is 2 there, 4 here"

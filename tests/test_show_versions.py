import skspin


def test_a_bug_report_says_what_there_is_and_what_there_is_not(capsys):
    skspin.show_versions()
    report = capsys.readouterr().out
    assert f"skspin: {skspin.__version__}\n" in report
    for word in ("python", "platform", "scikit-learn", "torch", "transformers", 'dtype="auto"'):
        assert f"{word}: " in report

# %%
# Exercise 07.1: Find the stale prompts
# <solution> stale = ...  # your code
right = bank.scores(volumes, list(log["adapter"]))
stale = [i for i, scores in log[list(FINDINGS)].iterrows() if np.abs(scores.to_numpy() - right[i]).max() > 1e-4]
# </solution>

check("07.1", stale, log, bank, volumes)


# %%
# Exercise 07.2: Prove it equal
def accepts(export, model, volumes):
    """Whether the export gives what the model gives, for any batch."""
    # <solution>
    for n in (1, 2, 3, 5):
        try:
            found = export(volumes[:n])
        except Exception:
            return False
        own = model(volumes[:n])
        if found.shape != own.shape or not np.abs(found - own).max() <= 1e-6:  # NaN falls through too
            return False
    return True
    # </solution>


check("07.2", accepts)

# %%
# Exercise 07.3: The patient behind the mean
names = [row["study"] for row in test.rows]
# <solution> study, finding = ..., ...  # your code
change = np.where((before >= thresholds) != (after >= thresholds), np.abs(after - before), 0)
row, column = np.unravel_index(change.argmax(), change.shape)
study, finding = names[row], FINDINGS[column]
# </solution>

check("07.3", (study, finding), names, thresholds, before, after)


# %%
# Exercise 07.4: What is wrong with this report?
def complaints(report):
    """Those of "final", "verified" and "no digest" that apply."""
    # <solution>
    texts = [str(element.value) for element in report.iterall() if element.keyword == "TextValue"]
    missing = [d for d in ("base: ", "adapter: ", "vocabulary: ") if not any(text.startswith(d) for text in texts)]
    return (
        ["final"] * (report.PreliminaryFlag != "PRELIMINARY")
        + ["verified"] * (report.VerificationFlag != "UNVERIFIED")
        + ["no digest"] * bool(missing)
    )
    # </solution>


check("07.4", complaints, report)

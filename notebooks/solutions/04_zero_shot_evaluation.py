# %%
# Exercise 04.1: Sensitivity and specificity
def sensitivity_and_specificity(labels, scores, threshold):
    """Share of the sick (label 1) called positive, and of the healthy (0) called negative; arrays (n,)."""
    # <solution>
    called = scores >= threshold
    return called[labels == 1].mean(), (~called[labels == 0]).mean()
    # </solution>


check("04.1", sensitivity_and_specificity)

# %%
# Exercise 04.2: What flattery is worth
thresholds = metrics.thresholds_from_validation(*found["adapted", "valid"][:2])
labels, scores, patients = found["adapted", "test"]
# <solution> flattery = ...  # your code
honest = metrics.evaluate(labels, scores, patients, thresholds=thresholds, resamples=2)
optimistic = metrics.evaluate(labels, scores, patients, thresholds="roc-corner-on-test", resamples=2)
flattery = optimistic.loc["mean", "f1"] - honest.loc["mean", "f1"]
# </solution>

check("04.2", flattery, labels, scores, patients, thresholds)

# %%
# Exercise 04.3: Every volume twice
twice_labels, twice_scores = np.concatenate([labels, labels]), np.concatenate([scores, scores])
# <solution> by_patients, by_volumes = ..., ...  # your code


def width(names):
    mean = metrics.evaluate(twice_labels, twice_scores, names, resamples=200, seed=0).loc["mean"]
    return mean["auroc_high"] - mean["auroc_low"]


by_patients = width(np.concatenate([patients, patients]))
by_volumes = width(np.arange(len(twice_labels)))
# </solution>

check("04.3", by_patients, by_volumes, labels, scores, patients)

# %%
# Exercise 04.4: Prompts of your own
# <solution> my_prompts = (..., ...)  # a sentence that states, and one that denies; {finding} stands for the name
my_prompts = ("This scan shows {finding}.", "This scan does not show {finding}.")
# </solution>
# <solution> my_auroc = ...  # mean AUROC of the adapted model with them, on the validation patients
my_scorer = ZeroShotClassifier(models["adapted"], base.tokenizer, prompts=my_prompts)
valid = seen["adapted", "valid"]
my_scores = my_scorer.scores_from_embeddings(valid.embeddings)
my_auroc = metrics.evaluate(valid.labels, my_scores, valid.patients, resamples=2).loc["mean", "auroc"]
# </solution>

check("04.4", my_prompts, my_auroc, models["adapted"], base.tokenizer, seen["adapted", "valid"])

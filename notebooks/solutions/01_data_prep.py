# %%
# Exercise 01.1: A window of your own
# <solution> my_window = (..., ...)  # centre, width
black, white = -100, 200
my_window = ((black + white) / 2, white - black)
# </solution>
check("01.1", my_window)


# %%
# Exercise 01.2: From HU to what the model sees
def to_model(hu):
    """Values in [-1, 1] that a model sees, from an array in HU."""
    # <solution>
    return np.clip(hu, -1000, 1000) / 1000
    # </solution>


check("01.2", to_model)

# %%
# Exercise 01.3: Back to Hounsfield units
stored = checks_data.stored_values()  # (slices, rows, columns)
# <solution> intercept = ...
intercept = -1000 - np.median(stored[:, :4])  # the first rows are in front of the patient: air
# </solution>
check("01.3", intercept)

# %%
# Exercise 01.4: Why splits go by patient
cohort = here.manifest
in_test = np.random.default_rng(seed).random(len(cohort)) < 0.5  # every scan drawn for itself
# <solution> on_both_sides = ...
sides = cohort.assign(side=in_test).groupby("patient")["side"].nunique()
on_both_sides = int((sides == 2).sum())
# </solution>
check("01.4", on_both_sides, cohort, in_test)

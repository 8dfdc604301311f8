# %%
# Exercise 00.1: Read the table
# <solution> most_likely = ...
most_likely = result.table.set_index("finding")["score"].idxmax()
# </solution>
check("00.1", most_likely, result.table)


# %%
# Exercise 00.2: A score for scores
def auroc(present, absent):
    """Share of pairs (one score of each array) in which the first is higher; a pair of equal scores counts half."""
    # <solution>
    first, second = present[:, None], absent[None, :]  # (n, 1) against (1, m): every pair once
    return float(((first > second) + 0.5 * (first == second)).mean())
    # </solution>


check("00.2", auroc)

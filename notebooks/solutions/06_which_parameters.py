# %%
# Exercise 06.1: Count before you train
text = config.text_config  # hidden_size, intermediate_size, num_hidden_layers
# <solution> feed_forward = ...  # your code
each = lora_count(text["hidden_size"], text["intermediate_size"], r=8)
feed_forward = 2 * each * text["num_hidden_layers"]  # widening and narrowing
# </solution>

check("06.1", feed_forward, config)


# %%
# Exercise 06.2: How many directions are enough?
def directions(strengths, share):
    """How many of the strongest directions it takes for `share` of the squared length; strengths fall."""
    # <solution>
    energy = np.cumsum(strengths**2) / np.sum(strengths**2)
    return int(np.searchsorted(energy, share - 1e-12)) + 1  # rounding must not cost a direction
    # </solution>


check("06.2", directions)

# %%
# Exercise 06.3: Is it chance?
runs = results.runs[results.runs["group"] == "methods"]
names = {method: runs.loc[runs["method"] == method, "name"] for method in ("lora", "full")}
# <solution> low, high = ..., ...  # your code
draws = {method: np.mean([results.draws[name] for name in names[method]], axis=0) for method in names}
low, high = np.percentile((draws["full"] - draws["lora"])[1:], (2.5, 97.5))
# </solution>

check("06.3", (low, high), results)

# %%
# Exercise 06.4: What is worth its parameters?
table = method_table(results)  # columns method, trainable, auroc, any_prompt, ...
# <solution> worth = ...  # your code
candidates = table[table["any_prompt"] & (table["trainable"] > 0)]
worth = [
    row.method
    for row in candidates.itertuples()
    if not candidates.query("trainable <= @row.trainable and auroc >= @row.auroc and method != @row.method").size
]
# </solution>

check("06.4", worth, table)

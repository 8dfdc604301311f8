# %%
# Exercise 03.1: Whose report is it?
def own_report_share(volumes, texts):
    """Share of the volumes (b, p) that are nearer to their own report than to all others of texts (b, p)."""
    # <solution>
    scores = volumes @ texts.T  # row i: volume i against all reports
    nearest = scores.argmax(dim=1)
    return (nearest == torch.arange(len(nearest))).float().mean()
    # </solution>


check("03.1", own_report_share)


# %%
# Exercise 03.2: The learning rate
def rate(step, steps, peak):
    """Learning rate at a step, counted from 0, with a tenth of the steps for the warm-up."""
    # <solution>
    warmup = round(0.1 * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    # </solution>


check("03.2", rate)


# %%
# Exercise 03.3: The same report twice
def info_nce_of_groups(volumes, texts, temperature, groups):
    """InfoNCE in which volumes of the same group (equal numbers in groups (b,)) are not told apart."""
    # <solution>
    scores = temperature.exp() * volumes @ texts.T
    own = torch.arange(len(scores))
    same = groups[:, None] == groups[None, :]
    same[own, own] = False  # the pair that is to be found stays
    scores = scores.masked_fill(same, -math.inf)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    # </solution>


check("03.3", info_nce_of_groups)

# %%
# Exercise 03.4: When to stop
history = result.history  # columns step, loss, prompts, score (validation AUROC), ...
# <solution> chosen_step = ...  # your code
chosen_step = history.loc[history["score"].idxmax(), "step"]
# </solution>

check("03.4", chosen_step, history)

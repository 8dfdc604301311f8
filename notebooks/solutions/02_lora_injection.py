# %%
# Exercise 02.1: The size of an adapter
def lora_size(fan_in, fan_out, r):
    """Parameters of a rank-r LoRA on a linear layer from fan_in to fan_out numbers."""
    # <solution>
    return r * fan_in + fan_out * r  # A (r, in) and B (out, r)
    # </solution>


check("02.1", lora_size)

# %%
# Exercise 02.2: A budget of one million
# <solution> rank = ...
rank = 1_000_000 // per_rank
# </solution>
check("02.2", rank)


# %%
# Exercise 02.3: Merge it
def merge(W, A, B, alpha, r):
    """The matrix of one plain layer that computes the same as W with its adapter."""
    # <solution>
    return W + alpha / r * B @ A
    # </solution>


check("02.3", merge)

# %%
# Exercise 02.4: Where the budget goes
# <solution> text_share = ...
text_share = 12 * 3 * (768 + 768) / per_rank
# </solution>
check("02.4", text_share)

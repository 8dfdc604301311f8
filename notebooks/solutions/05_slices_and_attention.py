# %%
# Exercise 05.1: What a patch receives
def received(maps):
    """How much attention each patch receives in one layer: maps (t, heads, queries, keys) to (t, keys)."""
    # <solution>
    return maps.mean(dim=(1, 2))
    # </solution>


check("05.1", received)


# %%
# Exercise 05.2: The pointing game
def pointing_game(heat, shares):
    """Whether the highest patch of a map (t, h, w) holds part of a finding; shares (t, h, w): filled by it, 0 to 1."""
    # <solution>
    highest = np.unravel_index(heat.argmax(), heat.shape)
    return shares[highest] >= 0.01
    # </solution>


check("05.2", pointing_game)


# %%
# Exercise 05.3: By chance
def by_chance(shares):
    """How often a map that knows nothing wins the pointing game; shares (t, h, w): filled by the finding, 0 to 1."""
    # <solution>
    return (shares >= 0.01).mean()
    # </solution>


check("05.3", by_chance)

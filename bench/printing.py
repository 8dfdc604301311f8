"""How the measuring programs print what they found."""


def show(name, values, indent=0):
    """Print nested figures, a line each."""
    print(f"{'  ' * indent}{name}")
    for key, value in values.items():
        if isinstance(value, dict):
            show(key, value, indent + 1)
        else:
            print(f"{'  ' * (indent + 1)}{key.replace('_', ' '):40} {value:,.4g}")

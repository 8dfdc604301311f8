"""From adapter to clinic. Hands nothing on: `deploy.exported` has to load where there is no torch."""

"""Look-ups inside running text: do models with gists still quote what stands far before?

Small models, trained on text whose later half quotes spans of its first half, beside plain text, in several ways.
"""

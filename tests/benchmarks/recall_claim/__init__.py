"""The experiment behind the method: does unfolding recover what compression loses, and does it matter what is unfolded?

Small models, trained from scratch on look-ups in a long context, with and without recall, at several compression ratios.
"""

"""WebShop: a goal in words, a shop to search, options to choose, one purchase.

Start with env.py. catalogue.py reads products and goals.py makes goals of them;
small_shop.py is a shop of this project's own. search.py ranks, shops.py holds
a shop in memory and store.py one on disk; pages.py shows it; reward.py judges.
"""

from actfocus_jax.envs.webshop.env import WebShop

__all__ = ['WebShop']

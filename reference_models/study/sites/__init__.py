"""Many sites, few protocols, few cases each: the regime in which sites could draw on experts."""

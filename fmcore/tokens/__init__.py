"""Documents -> TokenShards, and the order in which training reads them."""

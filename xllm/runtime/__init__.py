"""The lean runtime: requests in, batches planned over paged KV blocks, tokens out."""

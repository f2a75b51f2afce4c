-- The nodes that were heard of within so many milliseconds; those of more than a day ago are forgotten.
local within, day = num(ARGV[3]), num(ARGV[4])
redis.call('ZREMRANGEBYSCORE', NODES, '-inf', whole(now - day))
return redis.call('ZRANGEBYSCORE', NODES, '(' .. whole(now - within), '+inf', 'LIMIT', 0, 20000)

-- For how many milliseconds each node was not heard of, by Redis' clock: agents' clocks differ. Not those of more than a day.
local day = num(ARGV[3])
local heard = redis.call('ZRANGEBYSCORE', NODES, '(' .. whole(now - day), '+inf', 'WITHSCORES', 'LIMIT', 0, 20000)
for at = 2, #heard, 2 do
    heard[at] = whole(now - num(heard[at]))
end
return heard

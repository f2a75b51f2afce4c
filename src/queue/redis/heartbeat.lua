-- An agent is there: when it said so is Redis' to say, as agents' clocks differ. 0: its inventory is not there any more.
local node, sealed, inventory, day, keep = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
redis.call('ZADD', NODES, whole(now), node)
redis.call('SET', P .. 'beat:' .. node, sealed, 'PX', day)
if inventory ~= '' then
    redis.call('SET', P .. 'sessions:' .. node, inventory, 'PX', keep)
    return 1
end
return redis.call('PEXPIRE', P .. 'sessions:' .. node, keep)

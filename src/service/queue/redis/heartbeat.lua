-- An agent is there: when it said so is Redis' to say, as agents' clocks differ. 0: its inventory is not there any more.
-- With an inventory each session's record comes after its ID; one that is empty is remembered by a field without a name.
local node, sealed, day, keep, anew = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local sessions = P .. 'sessions:' .. node
redis.call('ZADD', NODES, whole(now), node)
redis.call('SET', P .. 'beat:' .. node, sealed, 'PX', day)
if anew == '1' then
    redis.call('DEL', sessions)
    redis.call('HSET', sessions, '', '')
    for at = 8, #ARGV - 1, 2 do redis.call('HSET', sessions, ARGV[at], ARGV[at + 1]) end
end
return redis.call('PEXPIRE', sessions, keep)

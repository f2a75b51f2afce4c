-- How full the queue is: orders that wait, orders that are held, reports.
local waiting, held = 0, 0
for _, node in ipairs(redis.call('SMEMBERS', BUSY)) do
    local here = redis.call('ZCARD', later_key(node))
    for _, user in ipairs(redis.call('ZRANGE', users_key(node), 0, -1)) do
        here = here + redis.call('LLEN', list_key(node, user))
    end
    local claims = redis.call('ZCARD', held_key(node))
    if here + claims == 0 then redis.call('SREM', BUSY, node) end
    waiting, held = waiting + here, held + claims
end
return { waiting, held, redis.call('XLEN', REPORTS) }

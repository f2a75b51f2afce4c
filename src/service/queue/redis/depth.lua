-- How full the queue is: orders that wait, orders that are held, reports.
local waiting, held = 0, 0
for _, node in ipairs(redis.call('SMEMBERS', BUSY)) do
    local here = waiting_in(node, '') + waiting_in(node, 'auto')
    local claims = redis.call('ZCARD', held_key(node))
    if here + claims == 0 then redis.call('SREM', BUSY, node) end
    waiting, held = waiting + here, held + claims
end
return { waiting, held, redis.call('XLEN', REPORTS) }

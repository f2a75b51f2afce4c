-- An order begins to wait, once: what is there already is at most replaced in its place.
local id, node, user, registry = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local fence_after, not_before, expires, attempt = ARGV[7], num(ARGV[8]), ARGV[9], ARGV[10]
local class, sealed = ARGV[14] == '1' and 'auto' or '', ARGV[15]
local fields = { 'n', node, 'u', user, 'r', registry, 'f', fence_after, 'x', expires, 't', attempt, 'lu', ARGV[11],
    'ln', ARGV[12], 'lr', ARGV[13], 'a', ARGV[14] }

local j = load(id)
if j then
    if j.s == 'w' or j.s == 'd' then
        if j.n == node and j.u == user and j.a == class then
            redis.call('HSET', job_key(id), unpack(fields))
            redis.call('SET', order_key(id), sealed)
        end
        return 0
    end
    if j.s ~= 'e' or num(attempt) <= j.t then return 0 end
end
redis.call('DEL', job_key(id))
redis.call('HSET', job_key(id), 's', not_before > now and 'd' or 'w', unpack(fields))
redis.call('SET', order_key(id), sealed)
if not_before > now then
    redis.call('ZADD', later_key(node, class), whole(not_before), id)
else
    enqueue(id, node, user, class)
end
redis.call('SADD', BUSY, node)
wake_node(node)
return 1

-- Gives an agent what it may do: claims of its node that were lost, then orders, user by user as their turns come, as
-- far as the limits of user, node and registry let them in. Autosaves come only when nothing else waits on the node.
--
-- Admission, delivery and lease are one step: there is no order between the lists and an agent that could be lost there.
local node, agent, most = ARGV[3], ARGV[4], num(ARGV[5])
local limit_user, limit_node, limit_registry = ARGV[6], ARGV[7], ARGV[8]
local reclaim, waits = ARGV[9] == '1', ARGV[10] == '1'
local stream, held = stream_key(node), held_key(node)
local desk, agents = desk_key(node), agents_key(node)
local claims, dropped, mine, blocked = {}, {}, {}, false

-- The last agent that showed up on this node is the one that lives; of the others sixteen are remembered.
if not redis.call('ZSCORE', agents, agent) then
    local last = redis.call('ZREVRANGE', agents, 0, 0, 'WITHSCORES')
    redis.call('ZADD', agents, num(last[2]) + 1, agent)
    for _, old in ipairs(redis.call('ZRANGE', agents, 0, -17)) do
        redis.call('ZREM', agents, old)
        local pending = redis.pcall('XPENDING', stream, 'agents', '-', '+', 1, old)
        if not pending.err and #pending == 0 then redis.pcall('XGROUP', 'DELCONSUMER', stream, 'agents', old) end
    end
end
redis.call('EXPIRE', agents, WEEK)
local youngest = redis.call('ZREVRANGE', agents, 0, 0)[1] == agent

local function is_full(id, j) return full(id, j, limit_user, limit_node, limit_registry) end

local function expire(id, j)
    dropped[#dropped + 1] = id
    forget(id, j)
end

local function grant(id, j)
    local sealed = redis.call('GET', order_key(id))
    if not sealed then
        forget(id, j)
        return false
    end
    local moved = j.s == 'h' and redis.pcall('XCLAIM', stream, 'agents', agent, 0, j.e, 'JUSTID') or {}
    if moved.err or #moved == 0 then
        j.e = redis.call('XADD', stream, '*', 'job', id)
        mine[j.e] = true
    end
    -- Not from what is stored alone: a queue that lost everything must not give out the same fence twice.
    local fence = whole(math.max(num(j.f) + 1, now_us))
    redis.call('HSET', job_key(id), 's', 'h', 'g', agent, 'e', j.e, 'f', fence)
    set_lease(id, j)
    claims[#claims + 1] = { id, fence, sealed }
    return true
end

local function take_over(ids, which)
    for _, id in ipairs(ids) do
        if #claims >= most then return end
        local j = load(id)
        if not j or j.s ~= 'h' or j.n ~= node then
            redis.call('ZREM', held, id)
        elseif which(j) then
            if j.x <= now then
                expire(id, j)
            elseif not is_full(id, j) then
                grant(id, j)
            end
        end
    end
end

local ended = redis.call('ZRANGEBYSCORE', held, '-inf', whole(now), 'LIMIT', 0, 256)
take_over(ended, function() return true end)

if reclaim then
    if youngest then
        take_over(redis.call('ZRANGE', held, 0, 1023), function(j) return j.g ~= agent end)
    end
    -- Entries that belong to no claim, whoever sent them: no other call acknowledges them.
    local stray = redis.pcall('XAUTOCLAIM', stream, 'agents', agent, whole(lease), '0-0', 'COUNT', 100, 'JUSTID')
    for _, entry in ipairs(not stray.err and stray[2] or {}) do
        local found = redis.call('XRANGE', stream, entry, entry)[1]
        local j = found and found[2][1] == 'job' and load(found[2][2])
        if not j or j.s ~= 'h' or j.e ~= entry then acknowledge({ n = node, e = entry }) end
    end
end

-- Admits the order of a class whose turn it is: nil none can be, true one was, false something unusable went away meanwhile.
local function admit(class)
    if class == 'auto' and waiting_in(node, '') > 0 then return nil end
    local users, served = users_key(node, class), class .. 'v'
    local last, waiting, unusable = num(redis.call('HGET', desk, served)), false, false
    local turns = redis.call('ZRANGE', users, 0, -1, 'WITHSCORES')
    for i = 1, #turns, 2 do
        local user, turn = turns[i], num(turns[i + 1])
        local list = list_key(node, user, class)
        local ids = redis.call('LRANGE', list, 0, 15)
        if #ids > 0 then
            waiting = true
        elseif turn <= last then
            -- A turn that is over tells nothing any more.
            redis.call('ZREM', users, user)
        end
        for _, id in ipairs(ids) do
            local j = load(id)
            if not j or j.s ~= 'w' or j.n ~= node or j.u ~= user or j.a ~= class then
                redis.call('LREM', list, 1, id)
                unusable = true
            elseif j.x <= now then
                expire(id, j)
                unusable = true
            else
                local limit = is_full(id, j)
                if limit == 'node' then return nil end
                if not limit then
                    redis.call('LREM', list, 1, id)
                    if not grant(id, j) then return false end
                    redis.call('HSET', desk, served, whole(math.max(last, turn)))
                    redis.call('ZADD', users, whole(turn + 1), user)
                    return true
                end
                blocked = true
                if limit == 'user' then break end
            end
        end
    end
    if unusable then return false end
    if not waiting then
        redis.call('DEL', users)
        redis.call('HDEL', desk, served)
    end
    return nil
end

local function enqueue_due(class)
    local later = later_key(node, class)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', whole(now), 'LIMIT', 0, 256)) do
        redis.call('ZREM', later, id)
        local j = load(id)
        if j and j.s == 'd' and j.n == node and j.a == class then
            redis.call('HSET', job_key(id), 's', 'w')
            enqueue(id, node, j.u, class)
        end
    end
end

if not reclaim then
    for _, class in ipairs({ '', 'auto' }) do enqueue_due(class) end
    for _, class in ipairs({ '', 'auto' }) do
        local rounds = 0
        while #claims < most and rounds < 1000 do
            rounds = rounds + 1
            if admit(class) == nil then break end
        end
    end
end

-- Delivers the entries made above to the agent. What else is in the stream is bells that are heard now, or forged.
for _ = 1, 64 do
    local got = redis.pcall('XREADGROUP', 'GROUP', 'agents', agent, 'COUNT', 256, 'STREAMS', stream, '>')
    if got and got.err then
        got = redis.pcall('XGROUP', 'CREATE', stream, 'agents', '0', 'MKSTREAM')
        if got.err then return redis.error_reply(got.err) end
    elseif got then
        for _, entry in ipairs(got[1][2]) do
            if not mine[entry[1]] then acknowledge({ n = node, e = entry[1] }) end
        end
        if #got[1][2] < 256 then break end
    else
        break
    end
end

-- When there may be something to do, in milliseconds.
local next_ms = 86400000
if #claims == 0 and waits then
    -- A caller that stopped waiting is still counted: a bell too many wakes one for nothing, one too few leaves one asleep.
    redis.call('HSET', desk, 'want', whole(math.max(0, math.min(7, num(redis.call('HGET', desk, 'want')))) + 1))
    if blocked then redis.call('SADD', BLOCKED, node) end
    for _, class in ipairs({ '', 'auto' }) do
        local due = redis.call('ZRANGE', later_key(node, class), 0, 0, 'WITHSCORES')[2]
        if due then next_ms = math.min(next_ms, num(due) - now) end
    end
    local lapse = redis.call('ZRANGEBYSCORE', held, '(' .. whole(now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    if lapse then next_ms = math.min(next_ms, num(lapse) - now) end
end
redis.call('EXPIRE', desk, WEEK)
return { claims, dropped, next_ms }

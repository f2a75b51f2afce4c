-- Where jobs are, two numbers each: 0 and how many go before it; 1 and the rest of its lease in milliseconds; -1: unknown.
-- A job that is in no list, because Redis lost that, is forgotten: its manager offers it again.
local found, nodes = {}, {}

-- A node's lists of a class, read once for all the jobs.
local function look(node, class)
    local seen = nodes[class .. ':' .. node]
    if seen then return seen end
    -- Autosaves come after everything else that waits.
    seen = { users = {}, all = 0, ahead = class == 'auto' and waiting_in(node, '') or 0 }
    local turns = redis.call('ZRANGE', users_key(node, class), 0, -1, 'WITHSCORES')
    for i = 1, #turns, 2 do
        local length = redis.call('LLEN', list_key(node, turns[i], class))
        seen.users[turns[i]] = { turn = num(turns[i + 1]), length = length }
        seen.all = seen.all + length
    end
    nodes[class .. ':' .. node] = seen
    return seen
end

local function before(id, j)
    local node = look(j.n, j.a)
    if j.s == 'd' then return redis.call('ZSCORE', later_key(j.n, j.a), id) and node.ahead + node.all or nil end
    local own = node.users[j.u]
    if not own then return nil end
    if not own.at then
        own.at = {}
        for index, waiting in ipairs(redis.call('LRANGE', list_key(j.n, j.u, j.a), 0, -1)) do own.at[waiting] = index - 1 end
    end
    local index = own.at[id]
    if not index then return nil end
    local count = node.ahead + index
    for name, other in pairs(node.users) do
        if name ~= j.u then
            -- Those of the same turn go in the order of the names.
            local past = own.turn + index - other.turn + (name < j.u and 1 or 0)
            count = count + math.max(0, math.min(other.length, past))
        end
    end
    return count
end

for i = 3, #ARGV do
    local id, kind, value = ARGV[i], -1, 0
    local j = load(id)
    if j and (j.s == 'w' or j.s == 'd') then
        local count = before(id, j)
        if count then
            kind, value = 0, count
        else
            forget(id, j)
        end
    elseif j and j.s == 'h' then
        kind, value = 1, math.max(0, num(redis.call('ZSCORE', held_key(j.n), id)) - now)
        -- Without its place among the held it would never be taken over.
        if not redis.call('ZSCORE', held_key(j.n), id) then redis.call('ZADD', held_key(j.n), whole(now), id) end
    elseif j and j.s == 'e' then
        kind, value = 1, 0
    end
    found[#found + 1] = kind
    found[#found + 1] = value
end
return found

-- What every script begins with: the same keys, the same clock and the same idea of a job in all of them.
--
-- KEYS[1] is the prefix; ARGV[1] how far the clock is ahead and ARGV[2] the lease, both in milliseconds. Whoever can write
-- to Redis can write anything here: so numbers are read with num(), and what does not fit together is thrown away.
local P = KEYS[1]

local function num(text)
    local number = tonumber(text)
    if not number or number ~= number then return 0 end
    -- Beyond these, numbers no longer count in steps of one.
    return math.max(-9e15, math.min(9e15, number))
end

local function whole(number) return string.format('%.0f', number) end

local clock = redis.call('TIME')
local now_us = num(clock[1]) * 1000000 + num(clock[2]) + num(ARGV[1]) * 1000
local now = math.floor(now_us / 1000)
local lease = num(ARGV[2])
local WEEK = 7 * 24 * 3600

-- Keys. A name stands last, or after its length: no name can reach into another one's key.
local REPORTS, NODES, BUSY, BLOCKED = P .. 'reports', P .. 'nodes', P .. 'busy', P .. 'blocked'
local ASKS = P .. 'asks'                                            -- list: questions to the managers
local function answer_key(nonce) return P .. 'answer:' .. nonce end -- list: the answers to one
local function job_key(id) return P .. 'job:' .. id end             -- hash: s state, n node, u user, r registry, ...
local function order_key(id) return P .. 'order:' .. id end         -- string: the sealed order
local function stream_key(node) return P .. 'stream:' .. node end   -- stream: one entry a claim, and bells
local function held_key(node) return P .. 'held:' .. node end       -- sorted set: jobs by the end of their leases
-- What waits on a node is in one of two classes, which names part of the key: '' for saves that were asked for, 'auto' for autosaves.
local function later_key(node, class) return P .. class .. 'later:' .. node end -- sorted set: jobs by when they may begin
local function users_key(node, class) return P .. class .. 'users:' .. node end -- sorted set: users by their next turns
local function desk_key(node) return P .. 'desk:' .. node end       -- hash: v and autov the last turns, want how many wait
local function agents_key(node) return P .. 'agents:' .. node end   -- sorted set: agents as they showed up
local function user_key(user) return P .. 'user:' .. user end       -- sorted set: a user's claims by their ends
local function registry_key(host) return P .. 'into:' .. host end   -- sorted set: a registry's claims by their ends
local function list_key(node, user, class) return P .. class .. 'list:' .. #node .. ':' .. node .. ':' .. user end

local function load(id)
    local f = redis.call('HMGET', job_key(id), 's', 'n', 'u', 'r', 'f', 'x', 't', 'g', 'e', 'c', 'k', 'lu', 'ln', 'lr', 'h', 'a')
    if not f[1] or not f[2] then return nil end
    return {
        s = f[1], n = f[2], u = f[3] or '', r = f[4] or '', f = f[5] or '0', x = num(f[6]), t = num(f[7]), g = f[8] or '',
        e = f[9] or '0-0', c = f[10] == '1', k = f[11] == '1', lu = num(f[12]), ln = num(f[13]), lr = num(f[14]), h = f[15] == '1',
        a = f[16] == '1' and 'auto' or '',
    }
end

-- Wakes one of those on the node who wait for something to do.
local function wake_node(node)
    local desk = desk_key(node)
    local want = num(redis.call('HGET', desk, 'want'))
    if want <= 0 then return end
    redis.call('HSET', desk, 'want', whole(want - 1))
    redis.call('XADD', stream_key(node), '*', 'bell', '1')
end

-- A place is free: wakes some of the nodes whose jobs wait for one. Those that find none ask again by themselves.
local function wake_blocked_nodes()
    for _, node in ipairs(redis.call('SPOP', BLOCKED, 8)) do wake_node(node) end
end

-- A user who comes, or comes back, is next with those who are next: neither behind fifty of another one's, nor before
-- everybody each time.
local function enqueue(id, node, user, class)
    local list, users = list_key(node, user, class), users_key(node, class)
    local empty = redis.call('RPUSH', list, id) == 1
    local turn, last = redis.call('ZSCORE', users, user), num(redis.call('HGET', desk_key(node), class .. 'v'))
    if not turn or (empty and num(turn) < last) then redis.call('ZADD', users, last, user) end
end

-- How many orders of a class wait on a node, whatever they wait for.
local function waiting_in(node, class)
    local count = redis.call('ZCARD', later_key(node, class))
    for _, user in ipairs(redis.call('ZRANGE', users_key(node, class), 0, -1)) do
        count = count + redis.call('LLEN', list_key(node, user, class))
    end
    return count
end

local function release_limits(id, j)
    redis.call('ZREM', held_key(j.n), id)
    redis.call('ZREM', user_key(j.u), id)
    redis.call('ZREM', registry_key(j.r), id)
end

local function acknowledge(j)
    redis.pcall('XACK', stream_key(j.n), 'agents', j.e)
    redis.pcall('XDEL', stream_key(j.n), j.e)
end

-- Nothing is left of the job.
local function forget(id, j)
    if j.s == 'w' then redis.call('LREM', list_key(j.n, j.u, j.a), 1, id) end
    if j.s == 'd' then redis.call('ZREM', later_key(j.n, j.a), id) end
    if j.s == 'h' then
        release_limits(id, j)
        acknowledge(j)
    end
    redis.call('DEL', job_key(id), order_key(id))
end

-- The stricter of what the manager wrote into the job and what the agent was told.
local function stricter(a, b)
    if a == 0 then return b end
    if b == 0 then return a end
    return math.min(a, b)
end

-- Which limit one more claim of the job would break. A claim whose lease has ended does not count, nor does the job itself.
-- An autosave leaves one place of each limit above 1 to other saves.
local function full(id, j, limit_user, limit_node, limit_registry)
    local function over(key, limit)
        if limit == 0 then return false end
        if j.a ~= '' and limit > 1 then limit = limit - 1 end
        local live, own = redis.call('ZCOUNT', key, '(' .. whole(now), '+inf'), redis.call('ZSCORE', key, id)
        if own and num(own) > now then live = live - 1 end
        return live >= limit
    end
    if over(held_key(j.n), stricter(j.ln, num(limit_node))) then return 'node' end
    if over(user_key(j.u), stricter(j.lu, num(limit_user))) then return 'user' end
    if over(registry_key(j.r), stricter(j.lr, num(limit_registry))) then return 'registry' end
    return nil
end

-- Another lease. What counts a user's or a registry's claims cleans up after those that were lost.
local function set_lease(id, j)
    local till = whole(now + lease)
    redis.call('ZADD', held_key(j.n), till, id)
    for _, key in ipairs({ user_key(j.u), registry_key(j.r) }) do
        redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now))
        redis.call('ZADD', key, till, id)
        redis.call('PEXPIRE', key, whole(lease * 2))
    end
end

-- Renews the claim with that fence: 0 it is lost, 1 held, 2 held and not wanted any more, 3 held and in a hurry; and the
-- job.
local function hold(id, fence, limit_user, limit_node, limit_registry)
    local j = load(id)
    if not j or j.s ~= 'h' or j.f ~= fence then return 0 end
    local till = redis.call('ZSCORE', held_key(j.n), id)
    if num(till) <= now and full(id, j, limit_user, limit_node, limit_registry) then return 0 end
    set_lease(id, j)
    -- Who looks at the stream's pending entries sees a claim that is alive.
    redis.pcall('XCLAIM', stream_key(j.n), 'agents', j.g, 0, j.e, 'JUSTID')
    if j.c then return 2, j end
    if j.h then return 3, j end
    return 1, j
end

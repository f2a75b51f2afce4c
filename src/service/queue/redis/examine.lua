-- Which of the commands that the queue gives are refused to this user. All is done on keys of its own, which are gone at
-- the end: a script is one step to everybody else.
local key = KEYS[1]
local refused = {}
local function try(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    local text = string.lower(answer.err)
    if string.find(text, 'noperm') or string.find(text, "can't run") or string.find(text, 'permission')
      or string.find(text, "can't access") then
      refused[#refused + 1] = (...)
    elseif string.find(text, 'readonly') or string.find(text, 'oom') then
      refused[#refused + 1] = (...) .. ' (' .. answer.err .. ')'
    end
  end
end
try('TIME')
try('SET', key, 'x')
try('GET', key)
try('MGET', key)
try('TYPE', key)
try('EXPIRE', key, '60')
try('PEXPIRE', key, '60000')
try('DEL', key)
try('HSET', key, 'f', 'v')
try('HGET', key, 'f')
try('HMGET', key, 'f')
try('HKEYS', key)
try('HSTRLEN', key, 'f')
try('HDEL', key, 'f')
try('DEL', key)
try('ZADD', key, '1', 'm')
try('ZSCORE', key, 'm')
try('ZCARD', key)
try('ZCOUNT', key, '-inf', '+inf')
try('ZRANGE', key, '0', '0')
try('ZREVRANGE', key, '0', '0')
try('ZRANGEBYSCORE', key, '0', '1')
try('ZREMRANGEBYSCORE', key, '5', '6')
try('ZREM', key, 'm')
try('DEL', key)
try('SADD', key, 'm')
try('SMEMBERS', key)
try('SREM', key, 'x')
try('SPOP', key)
try('DEL', key)
try('RPUSH', key, 'v')
try('LLEN', key)
try('LRANGE', key, '0', '0')
try('LREM', key, '0', 'v')
try('DEL', key)
try('XADD', key, '*', 'f', 'v')
try('XLEN', key)
try('XRANGE', key, '-', '+', 'COUNT', '1')
try('XGROUP', 'CREATE', key, 'g', '0')
try('XREADGROUP', 'GROUP', 'g', 'c', 'COUNT', '1', 'STREAMS', key, '>')
try('XPENDING', key, 'g')
try('XCLAIM', key, 'g', 'c', '0', '0-1')
try('XAUTOCLAIM', key, 'g', 'c', '0', '0', 'COUNT', '1')
try('XACK', key, 'g', '0-1')
try('XDEL', key, '0-1')
try('DEL', key)
return refused

-- What Quarto's Markdown knows beyond pandoc's: callouts, numbered figures, alternative texts.
local titles = {note = "Note", tip = "Tip", warning = "Warning", important = "Important", caution = "Caution"}
local numbers, count = {}, 0

local function callout(div)
  local kind
  for _, class in ipairs(div.classes) do kind = kind or class:match("^callout%-(%a+)$") end
  if not kind or not titles[kind] then return nil end
  local title, body = div.attributes["title"], div.content
  if not title and body[1] and body[1].t == "Header" then
    title = pandoc.utils.stringify(body[1])
    body = pandoc.List({table.unpack(body, 2)})
  end
  title = (title or titles[kind]):gsub("&", "&amp;"):gsub("<", "&lt;")
  local collapse = div.attributes["collapse"]
  local tag = collapse and "details" or "div"
  local open = collapse == "false" and " open" or ""
  local head = collapse and "summary" or "div"
  local result = pandoc.List({pandoc.RawBlock("html", string.format(
    '<%s class="callout callout-%s"%s><%s class="callout-title">%s</%s><div class="callout-body">',
    tag, kind, open, head, title, head))})
  result:extend(body)
  result:insert(pandoc.RawBlock("html", "</div></" .. tag .. ">"))
  return result
end

local function alternative(image)
  local alt = image.attributes["fig-alt"]
  image.attributes["fig-alt"] = nil
  if alt then image.attributes["alt"] = alt end
  return image
end

local function figure(fig)
  local name = fig.identifier
  if name == "" and fig.content[1] and fig.content[1].content and fig.content[1].content[1] then
    name = fig.content[1].content[1].identifier or ""
  end
  if not name:match("^fig%-") then return nil end
  count = count + 1
  numbers[name] = count
  local caption = fig.caption.long
  if caption[1] then
    caption[1].content:insert(1, pandoc.Str("Figure " .. count .. ": "))
  end
  fig.caption.long = caption
  return fig
end

local function reference(text)
  local name, rest = text.text:match("^@(fig%-[%w%-]+)(.*)$")
  if not name or not numbers[name] then return nil end
  return {pandoc.Link("Figure " .. numbers[name], "#" .. name), pandoc.Str(rest)}
end

local seen = {}

local function anchor(span)
  if span.identifier ~= "" and seen[span.identifier] then span.identifier = "" end
  return span
end

local function unique(head)  -- a name and a section may be called alike: links go to the first
  local name, n = head.identifier, 1
  while seen[head.identifier] do
    head.identifier = name .. "-" .. n
    n = n + 1
  end
  seen[head.identifier] = true
  return head
end

return {{Header = unique, Figure = figure}, {Image = alternative, Str = reference, Span = anchor, Div = callout}}
